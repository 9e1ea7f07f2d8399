//! Virtual-time executor of Tierwise plans.
