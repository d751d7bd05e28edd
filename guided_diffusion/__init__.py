"""ADM: "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal & Nichol, NeurIPS 2021, arXiv 2105.05233)."""
