"""Networks: backbones, heads, and the norm that keeps weak and strong images apart."""
