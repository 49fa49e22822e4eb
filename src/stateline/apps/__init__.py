"""Applications made of the library's parts: one file each."""
