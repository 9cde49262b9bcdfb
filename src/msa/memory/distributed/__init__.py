"""One bank over many processes and hosts."""
