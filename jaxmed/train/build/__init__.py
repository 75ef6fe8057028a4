"""How a run begins, in this order; `train.loop` calls each by name.

  resolve.check          the user's values by themselves
  records.open_records   the corpus, and the rows to train on
  records.tell_leaks     the search for rows that evaluation sets hold too
  data_spec.describe     what a run must know of its data
  resolve.resolve        the full config
  assemble.build         the trainer; shapes, order of the records, mesh
  rundir.save            config.json and data.json
  weights.state_of       the state to begin with
"""
