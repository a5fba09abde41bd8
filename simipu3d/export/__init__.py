"""Pre-trained branches as files that other projects load: converted, written, read back and compared before they
count."""
