"""From raw studies to a corpus: plan, items, blocks, workers, card; published folders; sets that are made here."""
