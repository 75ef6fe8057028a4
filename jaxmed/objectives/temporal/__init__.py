"""Methods of videos: what the frames of a window say together."""
