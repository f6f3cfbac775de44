"""Two runs against each other: read, align, judge, report."""
