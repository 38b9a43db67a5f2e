"""What every training script shares, whatever it trains on."""
