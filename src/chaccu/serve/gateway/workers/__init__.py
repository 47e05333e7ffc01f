"""Workers that have joined: which one answers, and how an answer outlives one of them."""
