"""Command lines: parse, build, run. Installed as `simipu3d.tools`."""
