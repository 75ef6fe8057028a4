"""What watches a run: agreement of processes, collapse, spikes, stalls, signals, rates, times."""
