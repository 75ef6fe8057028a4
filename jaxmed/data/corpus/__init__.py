"""What a corpus is on disk, and how it is opened: format, manifest, store, source, selections, object stores."""
