"""The names of scikit-learn that the estimators build on, or one error that says which extra brings them."""

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_array, check_consistent_length, check_random_state, column_or_1d
    from sklearn.utils.class_weight import compute_class_weight
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:
    needed = "SequenceClassifier and SequenceRegressor need scikit-learn, which cannot be imported"
    raise ImportError(f"{needed} ({error}). Install it: pip install 'stateline[sklearn]'.") from error

__all__ = [
    "BaseEstimator",
    "ClassifierMixin",
    "RegressorMixin",
    "check_array",
    "check_classification_targets",
    "check_consistent_length",
    "check_is_fitted",
    "check_random_state",
    "column_or_1d",
    "compute_class_weight",
]
