"""Grade-school word problems (GSM8K), for instruction-tuned models."""
