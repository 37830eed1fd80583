//! The macro by which the drivers mark their fault points.

/// Reaches a fault point, or the one that a function makes of what is at hand, if any.
#[cfg(feature = "fault-points")]
macro_rules! reach {
    ($($made_of:ident)::+ ( $($from:expr),* )) => {
        $crate::fault_points::reach($crate::fault_points::$($made_of)::+($($from),*))
    };
    ($point:ident) => {
        $crate::fault_points::reach($crate::fault_points::Point::$point)
    };
}

/// Nothing, in a build without the feature `fault-points`.
#[cfg(not(feature = "fault-points"))]
macro_rules! reach {
    ($($anything:tt)*) => {};
}
