//! The labs of the contenders, made at the same time.

use std::thread;

use anyhow::{Context as _, Result, anyhow};

use super::contenders::Kind;
use crate::lab::{Lab, Options};

/// A lab for each contender.
pub(super) struct Labs(Vec<(Kind, Lab)>);

impl Labs {
    /// Makes them.
    ///
    /// # Errors
    /// One does not come up; the others are removed again.
    pub(super) fn up(kinds: &[Kind], options: impl Fn(Kind) -> Options) -> Result<Self> {
        let made: Vec<Result<(Kind, Lab)>> = thread::scope(|scope| {
            let threads: Vec<_> = kinds
                .iter()
                .map(|kind| {
                    let options = options(*kind);
                    scope.spawn(move || up(*kind, options))
                })
                .collect();
            let done = threads.into_iter();
            done.map(|it| it.join().map_err(|_| anyhow!("a lab's thread panicked"))?).collect()
        });
        made.into_iter().collect::<Result<_>>().map(Self)
    }

    /// Each with whose it is.
    pub(super) fn all(&self) -> impl Iterator<Item = (Kind, &Lab)> {
        self.0.iter().map(|(kind, lab)| (*kind, lab))
    }

    /// Removes them.
    ///
    /// # Errors
    /// A part of one cannot be removed.
    pub(super) fn down(self) -> Result<()> {
        self.0.into_iter().try_for_each(|(kind, lab)| {
            lab.down().with_context(|| format!("the lab of {} does not go down", kind.label()))
        })
    }
}

fn up(kind: Kind, options: Options) -> Result<(Kind, Lab)> {
    let lab = Lab::up(options)
        .with_context(|| format!("the lab of {} does not come up", kind.label()))?;
    if !kind.is_ours() {
        // Nobody asks it, and it would work now and then.
        lab.stop_consul()?;
    }
    Ok((kind, lab))
}
