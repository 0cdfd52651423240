"""Reports of comparisons and sweeps: Markdown, HTML, plots."""
