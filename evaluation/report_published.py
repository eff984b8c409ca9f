"""Published numbers beside a report's own: context, greyed, with the protocol they were made under."""

from longtake.evaluation.report_data import ReportData


def published_section(data: ReportData) -> None:
    """Nothing yet."""
    return None
