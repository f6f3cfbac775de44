"""What a run says of itself: metrics, log lines, throughput."""
