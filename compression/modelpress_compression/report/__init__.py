"""The report: report.json from typed pieces, and the page that a person reads."""
