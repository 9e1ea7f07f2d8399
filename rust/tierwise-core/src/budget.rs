//! A hard byte limit: checked before bytes are taken, never after.

use crate::Tier;
use serde::{Deserialize, Serialize};

/// Asking for more than a tier has left.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{tier} budget exceeded: {what} needs {requested} bytes, {used} of {limit} bytes are in use ({shortfall} bytes short)")]
pub struct BudgetExceeded {
    /// The tier.
    pub tier: Tier,
    /// What the bytes were for.
    pub what: String,
    /// Bytes asked for.
    pub requested: u64,
    /// Bytes in use before.
    pub used: u64,
    /// The limit.
    pub limit: u64,
    /// Bytes missing.
    pub shortfall: u64,
}

/// Bytes in use of one tier, with their limit and peak.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    tier: Tier,
    limit: u64,
    used: u64,
    peak: u64,
}

impl Budget {
    /// An empty tier with a limit.
    pub fn new(tier: Tier, limit: u64) -> Self {
        Budget { tier, limit, used: 0, peak: 0 }
    }

    /// Takes bytes, or says by how much they do not fit.
    pub fn reserve(&mut self, bytes: u64, what: &str) -> Result<(), BudgetExceeded> {
        match self.used.checked_add(bytes) {
            Some(total) if total <= self.limit => {
                self.used = total;
                self.peak = self.peak.max(total);
                Ok(())
            }
            _ => Err(BudgetExceeded {
                tier: self.tier,
                what: what.to_owned(),
                requested: bytes,
                used: self.used,
                limit: self.limit,
                shortfall: bytes - (self.limit - self.used),
            }),
        }
    }

    /// Gives bytes back.
    ///
    /// # Panics
    /// If more is given back than was taken: that is a defect of the caller.
    pub fn release(&mut self, bytes: u64) {
        self.used = self.used.checked_sub(bytes).expect("released more bytes than were reserved");
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// The most bytes that were ever in use.
    pub fn peak(&self) -> u64 {
        self.peak
    }

    /// The limit.
    pub fn limit(&self) -> u64 {
        self.limit
    }
}
