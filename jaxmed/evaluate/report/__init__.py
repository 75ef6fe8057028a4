"""Pictures of a run and of its evaluations, which `page` puts into report.html."""
