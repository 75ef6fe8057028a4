"""What frozen features are worth: probes, metrics with intervals, baselines, tables, figures and reports."""
