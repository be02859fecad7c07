"""What a server is asked where no conversations are given: short questions of many kinds."""

PROMPTS = (
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain to a child why the sky is blue.",
    "Write a Python function that merges two sorted lists, and say how it works.",
    "A train leaves at 9:40 and arrives at 13:05. How long does it travel? Show the steps.",
    "Summarise the causes of the French Revolution in five sentences.",
    "Translate into German and French: The library opens at nine and closes at six.",
    "Compare electric and petrol cars in a table of four rows.",
    "Draft a polite letter that asks a landlord to repair a window.",
    "What are the main differences between TCP and UDP?",
    "Give a recipe for lentil soup for four people.",
    "Solve 3x + 7 = 2x - 5 and check the result.",
    "Write a SQL query for the three customers with the largest total of orders.",
    "Name ten ideas for a birthday party without screens.",
    "Explain how a bill becomes a law in a parliamentary democracy.",
    "Describe photosynthesis in the style of a sports commentator.",
    "Which data structure suits an undo function best, and why?",
)
