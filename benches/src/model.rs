//! A guest without KVM, whose pages move between two processes: for counting what a page costs.

use std::io::BufReader;
use std::sync::Arc;

use anyhow::{Result, bail};
use mig::describe::{Region, Schema};
use mig::{
    Address, Bitmap, BoxError, Compress, Control, Description, DestinationVm, DirtyTracker, GuestRam,
    Incoming, Listener, Outcome, ReceiveOptions, Received, Refusal, RestoreState, RunPermit, SaveState,
    Section, SourceOptions, SourceVm, VmControl, migrate, receive,
};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::child;

const PAGE_BYTES: u64 = 4096;

/// What is in the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Content {
    /// Something, from the first word on.
    Raw,
    /// Zeros that were written.
    Zero,
    /// Nothing was ever written.
    Untouched,
}

impl Content {
    /// Every content there is.
    pub const ALL: [Self; 3] = [Self::Raw, Self::Zero, Self::Untouched];

    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Zero => "zero",
            Self::Untouched => "untouched",
        }
    }
}

/// The source's side: moves a guest of so many pages over one channel to the address that it is told.
pub(crate) fn send(pages: u64, content: Content) -> Result<()> {
    let vm = Model::new(vec![Region { guest_address: 0, bytes: pages * PAGE_BYTES }])?;
    for page in 0..pages {
        let at = GuestAddress(page * PAGE_BYTES);
        match content {
            Content::Raw => vm.memory.write_obj(page + 1, at)?,
            Content::Zero => {
                vm.memory.write_obj(1u64, at)?;
                vm.memory.write_obj(0u64, at)?;
            }
            Content::Untouched => {}
        }
    }
    let Some(to) = child::hear::<String>(&mut BufReader::new(std::io::stdin()))? else { return Ok(()) };
    let to: Address = to.parse()?;
    let options = SourceOptions { channels: Some(1), compress: Compress::Off, ..SourceOptions::default() };
    // a thread of its own, so that what is counted is the engine's
    let engine = std::thread::spawn(move || match migrate(vm, &to, &options, &Control::new(), &()) {
        Outcome::Moved(_) => Ok(()),
        Outcome::StillHere { report, .. } | Outcome::Discarded(report) => bail!("not moved: {report:?}"),
    });
    engine.join().expect("the engine does not panic")?;
    child::say(&mut std::io::stdout(), &())
}

/// The destination's side: says where it listens, and takes one guest.
pub(crate) fn take() -> Result<()> {
    let listener =
        Listener::bind(&Address::tcp("127.0.0.1", 0)).map_err(|fault| anyhow::anyhow!("{fault}"))?;
    child::say(&mut std::io::stdout(), &listener.address().to_string())?;
    let engine = std::thread::spawn(move || {
        match receive(&listener, &mut Host, &ReceiveOptions::default(), &Control::new(), &()) {
            Received::Running { .. } => Ok(()),
            Received::NotReceived(fault) => bail!("not received: {fault}"),
            Received::Lost(copy) => bail!("lost: {}", copy.fault()),
        }
    });
    engine.join().expect("the engine does not panic")
}

/// The guest: nobody writes its memory.
struct Model {
    memory: Arc<GuestMemoryMmap>,
    regions: Vec<Region>,
    tracker: Quiet,
}

/// Finds nothing.
struct Quiet;

impl Model {
    fn new(regions: Vec<Region>) -> Result<Self> {
        let ranges = regions
            .iter()
            .map(|r| Ok((GuestAddress(r.guest_address), usize::try_from(r.bytes)?)))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { memory: Arc::new(GuestMemoryMmap::from_ranges(&ranges)?), regions, tracker: Quiet })
    }
}

impl DirtyTracker for Quiet {
    fn start(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    fn sync(&mut self, _: &mut Bitmap) -> Result<(), BoxError> {
        Ok(())
    }

    fn rearm(&self, _: u64, _: &[u64]) -> Result<(), BoxError> {
        Ok(())
    }

    fn stop(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl VmControl for Model {
    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    fn resume(&mut self, _: RunPermit) -> Result<(), BoxError> {
        Ok(())
    }
}

impl SaveState for Model {
    fn save(&mut self) -> Result<Vec<Section>, BoxError> {
        Ok(vec![Section::critical("model", 0, 1, &0u64)])
    }
}

impl RestoreState for Model {
    fn restore(&mut self, _: &[Section]) -> Result<(), BoxError> {
        Ok(())
    }
}

impl SourceVm for Model {
    fn describe(&self) -> Result<Description, BoxError> {
        Ok(Description {
            architecture: "model".into(),
            page_bytes: 4096,
            vcpus: 1,
            regions: self.regions.clone(),
            boot_id: None,
            schemas: vec![Schema { name: "model".into(), version: 1 }],
            platform: Vec::new(),
        })
    }

    fn memory(&self) -> GuestRam {
        GuestRam::from_vm_memory(self.memory.clone()).skip_untouched()
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut self.tracker
    }
}

impl DestinationVm for Model {
    fn memory(&self) -> GuestRam {
        GuestRam::from_vm_memory(self.memory.clone()).skip_untouched()
    }

    fn resume(&mut self, _: RunPermit) -> Result<(), BoxError> {
        Ok(())
    }
}

/// Takes models.
struct Host;

impl Incoming for Host {
    type Vm = Model;

    fn prepare(&mut self, description: &Description) -> Result<Model, Vec<Refusal>> {
        Model::new(description.regions.clone())
            .map_err(|error| vec![Refusal::new("memory", error.to_string(), "free some memory")])
    }
}
