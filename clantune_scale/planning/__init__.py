"""What a run will cost, by arithmetic: memory, bytes between ranks, seconds, and samples that are not new."""
