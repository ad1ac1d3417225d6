"""What the benchmarks share: ranks, the card, clocks, links, the gate, pages."""
