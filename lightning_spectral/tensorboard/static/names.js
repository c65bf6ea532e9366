// Names of runs, short enough for a chart: what all of them share is left out.

const LONGEST = 22;

/** name -> a short one. Names that differ have short names that differ, unless even their differences are very long. */
export function shortNames(names) {
  const words = names.map((name) => name.split(/[/_ ]+/).filter(Boolean));
  const forms = names.length > 1 ? [differing(words, true), differing(words, false), withoutKeys(differing(words, false))] : [];
  const texts = forms.map((form) => form.map((some, k) => some.join(" ") || names[k]));
  const chosen = texts.find((form) => form.every((text) => text.length <= LONGEST)) ?? texts.at(-1) ?? names;
  return new Map(names.map((name, k) => [name, elided(chosen[k])]));
}

/** Words that are not the same in all names (and what a number is of): by place, or between a common start and end. */
function differing(words, ofWhat) {
  const [first] = words;
  const alike = (of) => words.every((some) => of(some) === of(first));
  if (alike((some) => some.length)) {
    const differs = [...first.keys()].map((k) => !alike((some) => some[k]));
    const names = (k) => ofWhat && differs[k + 1] && /^\d/.test(first[k + 1]) && /^[A-Za-z]/.test(first[k]);
    const places = [...first.keys()].filter((k) => differs[k] || names(k));
    return words.map((some) => places.map((k) => some[k]));
  }
  const fewest = Math.min(...words.map((some) => some.length)) - 1;
  let [start, end] = [0, 0];
  while (start < fewest && alike((some) => some[start])) start += 1;
  while (end < fewest - start && alike((some) => some.at(-1 - end))) end += 1;
  return words.map((some) => some.slice(start, some.length - end));
}

/** `seed-0` and `seed-1` -> `0` and `1`, where every name has the key at that place. */
function withoutKeys(words) {
  const keyOf = (word) => /^[A-Za-z.]+[-=](?=.)/.exec(word ?? "")?.[0];
  const keys = (words[0] ?? []).map((word, k) => (words.every((some) => keyOf(some[k]) === keyOf(word)) ? keyOf(word) : undefined));
  return words.map((some) => some.map((word, k) => word.slice(keys[k]?.length ?? 0)));
}

const elided = (name) => (name.length > LONGEST ? `${name.slice(0, 10)}...${name.slice(13 - LONGEST)}` : name);
