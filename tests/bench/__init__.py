"""Speed and memory, as ratios against peers in one run. Run by hand, never as tests: timing here is a measurement."""
