"""Speed, as ratios measured in one run: absolute times say more of the machine than of the code."""
