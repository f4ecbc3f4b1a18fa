"""Settings of pytest that its configuration file has no option for."""


def pytest_itemcollected(item):
    """Leave standard error, where progress bars and warnings go, out of the comparison of outputs."""
    skipped = getattr(item.parent, "skip_compare", None)
    if skipped is not None and "stderr" not in skipped:
        item.parent.skip_compare = (*skipped, "stderr")
