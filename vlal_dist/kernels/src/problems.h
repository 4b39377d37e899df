// What can be wrong with a row's values, the first that is checked first; PROBLEM is defined where
// this is included, and arguments.py reads the texts. "inf" is a weight of what cannot be drawn.
PROBLEM(kBadRowWeight, "row_weight: a value is negative or not finite")
PROBLEM(kBadObject, "object_id: an id is not an object of the feasible table")
PROBLEM(kBadSet, "feasible: a set is not ascending ids of attributes within its offsets")
PROBLEM(kBadLabel, "label: a value is not -1, 0 or +1, or a pair is no attribute or annotated twice")
PROBLEM(kBadWeightRow, "weight_indptr: a row is not as long as its object's feasible set")
PROBLEM(kBadWeight, "inverse_weight: a value is below 1; give max likelihood / likelihood, or inf")
PROBLEM(kBadDrawn, "drawn: an id is neither an attribute nor -1")
