//! Offloaded activations: which region of the host slab holds what, and which copies of it are on their way.

use crate::device::EventRef;
use crate::error::{Error, Result};
use crate::memory::Regions;
use std::collections::BTreeMap;
use tierwise_core::slab::Guards;

/// One storage in host memory.
pub struct Away {
    /// Offset in the activation region.
    pub offset: u64,
    /// Bytes of the storage.
    pub bytes: u64,
    /// The unit that saved it.
    pub unit: u32,
    /// Its copy to the host.
    pub left: EventRef,
    /// Its latest copy back.
    pub back: Option<EventRef>,
}

/// The activation region of the host slab.
pub struct Activations {
    /// Address of the region.
    base: u64,
    regions: Regions,
    /// By ticket.
    away: BTreeMap<u64, Away>,
    /// Ranges that a copy to the device still reads.
    guards: Guards<EventRef>,
    next_ticket: u64,
    used_bytes: u64,
    peak_bytes: u64,
    /// Bytes copied to the host so far.
    pub out_bytes: u64,
    /// Bytes copied back so far.
    pub in_bytes: u64,
}

impl Activations {
    /// Nothing is away.
    pub fn new(base: u64, bytes: u64) -> Self {
        Activations {
            base,
            regions: Regions::new(bytes),
            away: BTreeMap::new(),
            guards: Guards::default(),
            next_ticket: 0,
            used_bytes: 0,
            peak_bytes: 0,
            out_bytes: 0,
            in_bytes: 0,
        }
    }

    /// A place for `bytes` and whom writing there has to wait for, or `None` if there is no room.
    pub fn take(&mut self, bytes: u64) -> Option<(u64, Vec<EventRef>)> {
        let offset = self.regions.take(bytes).ok()?;
        self.used_bytes += bytes;
        self.peak_bytes = self.peak_bytes.max(self.used_bytes);
        Some((offset, self.guards.reuse(offset, offset + bytes)))
    }

    /// Keeps what was sent to a place; gives its ticket.
    pub fn keep(&mut self, away: Away) -> u64 {
        self.out_bytes += away.bytes;
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.away.insert(ticket, away);
        ticket
    }

    /// What a ticket stands for.
    pub fn get(&mut self, ticket: u64) -> Result<&mut Away> {
        self.away.get_mut(&ticket).ok_or_else(|| Error::Usage(format!("no activation has ticket {ticket}")))
    }

    /// Gives the place back. Whoever takes it next waits for a copy that still reads it; copies to the host are in order anyway.
    pub fn free(&mut self, ticket: u64) -> Result<()> {
        let away = self.away.remove(&ticket).ok_or_else(|| Error::Usage(format!("no activation has ticket {ticket}")))?;
        if let Some(back) = away.back {
            self.guards.protect(away.offset, away.offset + away.bytes, back);
        }
        self.regions.give(away.offset, away.bytes);
        self.used_bytes -= away.bytes;
        Ok(())
    }

    /// Host address of a place.
    pub fn address(&self, offset: u64) -> u64 {
        self.base + offset
    }

    /// Bytes in host memory, and the most there ever were.
    pub fn bytes(&self) -> (u64, u64) {
        (self.used_bytes, self.peak_bytes)
    }
}
