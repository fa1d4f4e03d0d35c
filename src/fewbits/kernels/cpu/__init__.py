"""Native kernels: the Python side packs weights and hands addresses to `fewbits._native`."""
