//! Residency of a payload: where the one authoritative copy is, and what is happening to it.
//!
//! The table in [`Residency::apply`] is the only place where a residency changes. Every pair that it does not list is an
//! [`IllegalTransition`]: an error, never ignored.

use crate::{ChunkId, Tier};
use serde::{Deserialize, Serialize};

/// Where a payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Residency {
    /// No bytes anywhere: a gradient before its backward.
    Absent,
    /// One copy, authoritative.
    At(Tier),
    /// The copy at `home` is authoritative; a clean copy is being made or was made at `cache` (ordered by its stream).
    Cached {
        /// Tier of the authoritative copy.
        home: Tier,
        /// Tier of the clean copy.
        cache: Tier,
    },
    /// The only copy is leaving `from` for `to`; `from` is authoritative until the copy lands.
    Moving {
        /// Tier of the authoritative copy.
        from: Tier,
        /// Tier that receives it.
        to: Tier,
    },
    /// The authoritative copy is being rewritten in place; no other copy is valid.
    Writing(Tier),
    /// Rewritten in place ahead of the decision, behind an undo record; `cache` still holds the decided generation.
    Tentative {
        /// Tier of the tentative copy and its undo record.
        home: Tier,
        /// A clean copy of the decided generation, if there is one.
        cache: Option<Tier>,
    },
}

/// What happens to a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transition {
    /// Bytes appear at a tier.
    Create(Tier),
    /// A clean copy is started at another tier.
    Cache(Tier),
    /// The clean copy is given up.
    DropCache,
    /// The only copy starts to move.
    Move(Tier),
    /// The moving copy arrived.
    Land,
    /// The authoritative copy starts to be rewritten. Cached copies must have been given up.
    BeginWrite,
    /// The rewrite is complete.
    FinishWrite,
    /// The authoritative copy was rewritten behind an undo record.
    Speculate,
    /// The tentative copy becomes authoritative; a cached copy of the old generation is given up.
    Accept,
    /// The undo record is written back.
    Undo,
    /// The bytes are consumed: a gradient after its step.
    Consume,
}

/// A transition that the table does not list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("illegal transition of chunk {chunk} `{payload}`: {transition:?} while {state:?}", chunk = chunk.0)]
pub struct IllegalTransition {
    /// The chunk.
    pub chunk: ChunkId,
    /// The payload.
    pub payload: &'static str,
    /// Residency before.
    pub state: Residency,
    /// What was asked for.
    pub transition: Transition,
}

impl Residency {
    /// The residency after a transition, or `None` if it is illegal. This is the transition table.
    #[expect(clippy::match_same_arms, reason = "one line per entry of the table")]
    pub fn apply(self, transition: Transition) -> Option<Residency> {
        use Residency as R;
        use Transition as T;
        Some(match (self, transition) {
            (R::Absent, T::Create(tier)) => R::At(tier),
            (R::At(home), T::Cache(cache)) if cache != home => R::Cached { home, cache },
            (R::At(from), T::Move(to)) if to != from => R::Moving { from, to },
            (R::At(home), T::BeginWrite) => R::Writing(home),
            (R::At(home), T::Speculate) => R::Tentative { home, cache: None },
            (R::At(_), T::Consume) => R::Absent,
            (R::Cached { home, .. }, T::DropCache) => R::At(home),
            (R::Cached { home, cache }, T::Speculate) => R::Tentative { home, cache: Some(cache) },
            (R::Moving { to, .. }, T::Land) => R::At(to),
            (R::Writing(home), T::FinishWrite) => R::At(home),
            (R::Tentative { home, .. }, T::Accept) => R::At(home),
            (R::Tentative { home, cache: None }, T::Undo) => R::At(home),
            (R::Tentative { home, cache: Some(cache) }, T::Undo) => R::Cached { home, cache },
            (R::Tentative { home, cache: Some(_) }, T::DropCache) => R::Tentative { home, cache: None },
            _ => return None,
        })
    }

    /// Applies a transition of a chunk's payload, or names what was illegal.
    pub fn advance(&mut self, chunk: ChunkId, payload: &'static str, transition: Transition) -> Result<(), IllegalTransition> {
        *self = self.apply(transition).ok_or(IllegalTransition { chunk, payload, state: *self, transition })?;
        Ok(())
    }

    /// The tier of the authoritative copy.
    pub fn authority(self) -> Option<Tier> {
        match self {
            Residency::Absent => None,
            Residency::At(tier)
            | Residency::Cached { home: tier, .. }
            | Residency::Moving { from: tier, .. }
            | Residency::Writing(tier)
            | Residency::Tentative { home: tier, .. } => Some(tier),
        }
    }

    /// Whether the compute stream may read the decided generation at a tier.
    pub fn readable_at(self, tier: Tier) -> bool {
        match self {
            Residency::At(home) => home == tier,
            Residency::Cached { home, cache } => home == tier || cache == tier,
            Residency::Tentative { cache, .. } => cache == Some(tier),
            Residency::Absent | Residency::Moving { .. } | Residency::Writing(_) => false,
        }
    }

    /// Tiers that hold bytes of the payload, whatever their state.
    pub fn tiers(self) -> impl Iterator<Item = Tier> {
        let (first, second) = match self {
            Residency::Absent => (None, None),
            Residency::At(tier) | Residency::Writing(tier) => (Some(tier), None),
            Residency::Cached { home, cache } => (Some(home), Some(cache)),
            Residency::Moving { from, to } => (Some(from), Some(to)),
            Residency::Tentative { home, cache } => (Some(home), cache),
        };
        first.into_iter().chain(second)
    }
}
