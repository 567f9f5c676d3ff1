"""Networks: backbones, heads, and batch norm with separate domains for weak and strong images."""
