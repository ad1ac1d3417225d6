"""The local stages: pool, score, select, gather, scatter. No communication."""
