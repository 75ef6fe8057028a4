"""What people see of a run: report.html and its figures."""
