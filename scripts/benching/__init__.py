"""Cases of the benchmark beside throughput and latency: `sharing`."""
