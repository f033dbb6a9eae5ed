"""Where a value lies that is to be recalled, seen from its use (nsa.eval.tasks.recall)."""

INSIDE, BEYOND, OUT_OF_REACH = "inside the window", "beyond the window", "beyond the stacked windows"
ANYWHERE = "at any distance"
