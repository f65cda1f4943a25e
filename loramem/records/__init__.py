"""Records: what is written, how it is read from files, and the prompts that ask for it."""
