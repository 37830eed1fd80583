//! A short list that is plain data: what a state of the checker holds of queues and of work under way.

/// At most `N` things, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Line<T, const N: usize> {
    /// The first ones, without a gap; the rest is `None`, so that equal lists are equal.
    items: [Option<T>; N],
}

impl<T: Copy + Ord, const N: usize> Line<T, N> {
    pub(super) const EMPTY: Self = Self { items: [None; N] };

    pub(super) fn iter(&self) -> impl Iterator<Item = T> + '_ {
        self.items.iter().map_while(|item| *item)
    }

    pub(super) fn first(&self) -> Option<T> {
        self.items.first().copied().flatten()
    }

    pub(super) fn contains(&self, item: T) -> bool {
        self.iter().any(|other| other == item)
    }

    /// Appends. More than fit is a mistake of the model's bounds, not something to pass over.
    pub(super) fn push(&mut self, item: T) {
        let free = self.items.iter_mut().find(|item| item.is_none());
        *free.unwrap_or_else(|| panic!("more than {N} things in a line")) = Some(item);
    }

    pub(super) fn remove_first(&mut self) -> Option<T> {
        self.remove_at(0)
    }

    /// Adds to a list without an order: equal sets are equal lists.
    pub(super) fn insert(&mut self, item: T) {
        self.push(item);
        let len = self.iter().count();
        self.items[..len].sort_unstable();
    }

    pub(super) fn remove(&mut self, item: T) {
        let at = self.iter().position(|other| other == item);
        if let Some(at) = at {
            self.remove_at(at);
        }
    }

    fn remove_at(&mut self, at: usize) -> Option<T> {
        let item = self.items[at].take();
        self.items[at..].rotate_left(1);
        item
    }
}
