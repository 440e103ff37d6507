"""Networks of frames: recognizers of speech and of text lines, and detectors of voice."""
