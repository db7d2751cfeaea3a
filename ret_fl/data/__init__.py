"""Images by ID: where they come from (sources), how they are kept (store), and how they are dealt out (partition)."""
