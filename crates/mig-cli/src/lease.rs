//! The lease that both programs may share: `--lease FILE`.

use std::path::PathBuf;
use std::sync::Arc;

use mig::Arbiter;
use mig::arbiter::{LeaseError, LeaseFile};

use crate::failure::{Failure, chain};

/// Opens or creates it, if there is to be one.
///
/// # Errors
/// It cannot be used, or is no lease; it is unchanged then.
pub fn open(path: &Option<PathBuf>, side: &str) -> Result<Option<Arc<dyn Arbiter>>, Failure> {
    let Some(path) = path else { return Ok(None) };
    let lease = LeaseFile::open(path).map_err(|e| {
        let failure = Failure::new(side, "lease", chain(&e), e.remedy());
        if matches!(e, LeaseError::Io { .. } | LeaseError::Locked { .. }) { failure.local() } else { failure }
    })?;
    Ok(Some(Arc::new(lease)))
}
