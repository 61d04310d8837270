"""etcbench: visual-token compression in vision-language models, measured on equal terms."""
