"""Headings that a report and the summary of a run have in common."""

COMPARED = "Every attention at every length, in the model, on the same words"
MEASURED = "Each configuration as it was asked for, means over samples, layers and heads"
ADVANTAGE = "The best sub-quadratic pattern of ours minus the best published one"
RECALL_BY_COST = (
    "Recall of gold edges at equal total cost: multiplications of prediction and attention, as a share of those of dense "
    "attention over all allowed pairs (± as above)"
)
ADVANTAGE_BY_COST = "The best sub-quadratic pattern of ours minus the best of all others at equal total cost"
ADVANTAGE_OVER_ALL = (
    "The best sub-quadratic pattern of ours minus the best of all others, those that compare every pair among them, at equal "
    "density"
)
TO_HOVER = (
    "Every configuration is a point: hover or tap one for its numbers. A line joins the configurations of a pattern "
    "that no other one of it beats, paler points are beaten; up and to the right is better. A click on a name shows "
    "or hides a pattern. Dashed lines: predicting compares every pair (open markers) or knows the true scores (filled), so "
    "it saves no work by itself. The dotted vertical is the mean density of the gold graph, the star that graph "
    "itself, random what chance recalls. A window and global tokens count as predicted."
)


def recall(over_runs: bool) -> str:
    """The heading of the table of recalls, of one run or of several."""
    spread = "one deviation over the runs" if over_runs else "half the 95 % interval over documents"
    return f"Recall of gold edges at equal density (± {spread}; * compares every pair)"


def with_interval(heading: str, over_runs: bool, said: bool = False) -> str:
    """The heading of a table of differences; what follows them stands there, unless it was ``said`` just before."""
    return heading if over_runs else f"{heading} ({'as above' if said else '95 % interval, paired over documents'})"
