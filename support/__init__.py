"""What serves the five files of the root: files, texts, options, checks, resuming, several processes."""
