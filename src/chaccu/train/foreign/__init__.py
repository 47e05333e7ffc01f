"""Other trainers: how their configurations are read, and what their keys come to in a recipe. Free of torch."""
