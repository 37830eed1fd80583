//! Who may run the guest, counted by the permits that are really spent.

use mig_core::Side;

use crate::verdict::Violation;

/// Who may run the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    Source,
    /// The source spent its permit, the destination has not minted one.
    Nobody,
    Destination,
}

/// The account. Who is gone runs nothing any more; even so nobody may take its guest over but on an operator's
/// word.
#[derive(Debug)]
pub(crate) struct Permits {
    holder: Holder,
    source_gone: bool,
    destination_gone: bool,
}

impl Permits {
    /// The guest starts at the source.
    pub(crate) fn new() -> Self {
        Self { holder: Holder::Source, source_gone: false, destination_gone: false }
    }

    /// The guest of a side, if it has it, is no more.
    pub(crate) fn gone(&mut self, side: Side) {
        match side {
            Side::Source => self.source_gone = true,
            Side::Destination => self.destination_gone = true,
        }
    }

    /// Whether a side has the guest.
    pub(crate) fn run_at(&self, side: Side) -> bool {
        match side {
            Side::Source => self.holder == Holder::Source && !self.source_gone,
            Side::Destination => self.holder == Holder::Destination && !self.destination_gone,
        }
    }

    /// The source spends its permit on the destination, which may have it already.
    pub(crate) fn given_away(&mut self) -> Result<(), Violation> {
        match self.holder {
            Holder::Source => self.holder = Holder::Nobody,
            Holder::Nobody => return Err(Violation::TwoRunners { side: Side::Source }),
            Holder::Destination => {}
        }
        Ok(())
    }

    /// The source spends a permit on itself, on an operator's word or not.
    pub(crate) fn taken_back(&mut self, word: bool) -> Result<(), Violation> {
        if self.holder == Holder::Destination && !(self.destination_gone && word) {
            return Err(Violation::TwoRunners { side: Side::Source });
        }
        self.holder = Holder::Source;
        Ok(())
    }

    /// The destination spends a permit, on an operator's word or not. A source that has not committed and does
    /// not run the guest just now has `forfeited` it where the arbiter gave it to the destination.
    pub(crate) fn taken_over(&mut self, word: bool, forfeited: bool) -> Result<(), Violation> {
        let free = match self.holder {
            Holder::Nobody => true,
            Holder::Source => word && (self.source_gone || forfeited),
            Holder::Destination => false,
        };
        if !free {
            return Err(Violation::TwoRunners { side: Side::Destination });
        }
        self.holder = Holder::Destination;
        Ok(())
    }
}
