"""Word lists for names and values."""

from __future__ import annotations

from msa.training.worlds.schema import listed, words

MALE = words("""
Aaron Abel Adrian Ahmed Akira Alan Albert Aleksander Alfred Ali Alistair Amadou Amos Anders Andrei
Anton Antonio Arjun Armand Arne Arthur Arturo Axel Babak Baptiste Bashir Benedikt Bernard Bjorn
Boris Bruno Caleb Carl Carlos Casper Cedric Chidi Christopher Claude Clement Conrad Cornelius
Cyril Damian Daniel Dariusz David Denis Desmond Diego Dmitri Dominik Douglas Edgar Edmund Eduardo
Edwin Einar Elias Emil Emmanuel Enrique Erik Ernest Esteban Eugene Farid Felix Ferdinand Fergus
Filip Finn Florian Francesco Frank Frederick Gabriel Gareth Gaston George Gerard Gilbert Giovanni
Gregor Guillermo Gunnar Gustav Hamid Hamish Hans Harold Hassan Hector Hendrik Henri Hiroshi Horace
Hugo Ibrahim Ignacio Igor Ilya Isaac Ismail Ivan Jakob Jan Jasper Javier Jerome Jiro Joachim Joel
Johan Jonas Jorge Jorgen Joseph Julian Julius Kamal Karel Kenji Kofi Kwame Lars Laszlo Laurence
Lech Leif Leon Leonard Leopold Lorenzo Louis Lucas Ludwig Luis Magnus Malcolm Manuel Marcel Marco
Marek Mario Martin Matthias Maurice Max Mehmet Miguel Mikhail Milan Mohan Moritz Nathan Nikolai
Nils Norman Olaf Oleg Oliver Omar Oscar Osman Oswald Otto Pablo Pascal Patrick Paul Pavel Pedro
Percy Peter Philippe Pierre Piotr Rafael Rahul Rainer Ralph Ramon Rashid Raymond Reginald Ricardo
Robert Rodrigo Roland Roman Rudolf Rupert Samir Samuel Sandor Sanjay Sebastian Sergei Severin
Sigurd Silvio Simon Stanislav Stefan Sven Takeshi Tariq Theodor Thomas Tibor Tobias Tomas Torsten
Tunde Ulrich Umberto Vaclav Valentin Victor Vikram Viktor Vincent Vladimir Walter Werner Wilhelm
William Xavier Yannick Yosef Yusuf Zoltan
""")

FEMALE = words("""
Abigail Ada Adela Adriana Agatha Agnes Aiko Aisha Alba Alice Alma Amalia Amara Amelia Amina
Anastasia Andrea Angela Anita Anna Annika Antonia Anya Astrid Aurora Ayesha Barbara Beata Beatrice
Bella Berit Bianca Birgit Bridget Britta Camilla Carla Carmen Caroline Catherine Cecilia Celeste
Chiara Chiyo Clara Claudia Colette Constance Cora Cordelia Corinna Dagmar Daria Deborah Delia
Diana Dina Dolores Dora Dorothea Edith Eleanor Elena Elif Elin Elisabeth Ella Eloise Elsa Elvira
Emilia Emma Erika Esther Eva Evelyn Farah Fatima Fiona Flora Florence Francesca Freya Frida
Gabriela Gemma Genevieve Gertrude Gisela Giulia Gloria Greta Gudrun Hana Hanna Harriet Hedwig
Helena Henrietta Hilda Ida Ilona Imogen Ines Ingrid Irena Iris Irma Isabel Isolde Ivana Jadwiga
Jana Jane Jasmina Jelena Joanna Johanna Josefa Judith Julia Juliana June Kaja Karin Katarina
Kathleen Keiko Kerstin Klara Kristina Laila Lara Larissa Laura Layla Lea Leila Lena Leonora Lidia
Lina Linda Liv Louisa Lucia Lucy Ludmila Lydia Mabel Madeleine Magda Maja Malin Manuela Margaret
Margit Maria Marian Marina Marta Martha Matilda Maud Meera Melania Mercedes Michiko Milena Mina
Mira Miriam Monika Nadia Naomi Natalia Nell Nina Noor Nora Olga Olivia Ottilie Paloma Paula
Pauline Penelope Petra Philippa Phoebe Pilar Priya Rachel Rebecca Regina Renata Rita Rosa Rosalind
Roxana Ruth Sabina Salma Sandra Sara Selma Senta Sibyl Sidonie Signe Silvia Simone Sofia Sonja
Stella Susanna Svetlana Sylvia Tamara Tatiana Teresa Thea Theodora Tilda Ulrike Ursula Valeria
Vanessa Vera Verena Veronica Victoria Viola Violet Wanda Wilma Winifred Yasmin Yoko Yolanda Yumi
Zelda Zofia Zora
""")

SURNAMES = words("""
Abbott Acheson Adeyemi Aldous Almeida Alvarado Amsel Andrade Arbour Archer Arnaud Ashby Aubrey
Bagley Balogun Banerjee Barbosa Barclay Barlow Bartok Bassett Baudin Becker Beckett Bellamy Benitez
Bergeron Beltran Bianchi Birch Blackwood Blanchard Bonnet Borges Boucher Bowen Brandt Brennan
Briggs Brodie Brunner Burgess Cabrera Calloway Campos Cardoso Carver Castell Chadwick Chandra
Chatterjee Chevalier Clements Colombo Cordova Corrigan Costa Crane Cromwell Cullen Dalton Danvers
Darby Delacroix Delgado Denham Diallo Dietrich Doherty Donnelly Drake Dubois Duarte Dumont Dvorak
Easton Ebner Eklund Ellery Emerson Escobar Estrada Fairfax Falk Farrell Faulkner Ferrara Fiala
Finch Fitzroy Fleming Fontaine Forsyth Fournier Frost Fuchs Fujita Gallagher Gallo Garnier Gautier
Gerber Gibbs Gilmore Giraud Godfrey Goldman Granger Grimaldi Guerra Gupta Haas Hadley Hagen Halloran
Hammond Hargreave Hartmann Haugen Hawke Hayashi Heller Herrera Hobbs Hoffman Holloway Horvath
Huxley Ibarra Ingram Iversen Jain Janacek Jarvis Jensen Joshi Kamara Kaplan Kapoor Kaya Keating
Keller Kemp Kendall Kimura Kirchner Klein Kohler Kovacs Kowalski Kramer Kruger Kuhn Lacroix Lamb
Langley Laurent Leclerc Lefebvre Lehmann Leone Lombardi Lopes Lowell Lund Mackay Madsen Maguire
Malone Mancini Marchetti Marlowe Marsh Mazur Medina Mehta Mendes Mercer Meyer Molina Montague
Moreau Moretti Morimoto Mueller Nakata Navarro Nemeth Nair Neville Nolan Norwood Novak Nyberg
Oakley Obi Ochoa Okafor Olsen Orsini Ortega Osborne Paget Palacios Palmer Paredes Parrish Pascoe
Patel Pellegrini Pemberton Petit Pires Pohl Poirier Pollard Popescu Prescott Quigley Quintana Rao
Raskin Redmond Reinhardt Renard Rhodes Ribeiro Ricci Rivera Robles Romano Rossi Rousseau Rowland
Sadler Salazar Sandoval Santoro Sato Sauer Savage Schiller Seymour Shah Sharma Shelby Silva Sinclair
Skinner Slater Snyder Soares Solberg Somers Sorensen Stark Steiner Sterling Strand Suzuki Sykes
Szabo Takeda Tanaka Tavares Tennant Thorne Tiwari Toledo Toth Traore Tremblay Trevino Tucker Ueda
Ullman Urquhart Valdes Vance Vargas Vasquez Vaughan Veidt Vidal Villalobos Vogel Voss Wagner
Wainwright Walsh Warwick Watts Weaver Weber Weir Whitlock Wickham Wilde Winslow Wolff Wyatt Yamada
Yates Yilmaz Zamora Zeller Ziegler Zimmer
""")

SURNAME_STEMS = words("""
Ab Al And Arn Asher Bal Bar Beck Bell Berg Birk Black Blom Bor Brand Brant Brin Bur Cald Carl Cas
Chal Clay Crom Dal Dan Dor Drum Dun East Edel Ek Elk Ell Fair Fal Far Fen Fern Forr Gar Gil Glen
Gold Gran Green Grim Hal Ham Hard Hart Hav Hed Hel Hen Hil Hol Horn Isak Jan Kal Kar Kel Kol Lam
Lar Lin Lind Lock Lor Lund Mal Mar Mat Mel Mil Mor Nord Nor Oden Ost Pel Per Pet Quin Rad Ram Rav
Red Ren Ros Rud Sal Sand Sel Sil Skog Stan Steen Stern Strand Sund Tal Tar Thal Thor Til Tor Ul
Val Ven Vest Vin Wal War Wel Wen West White Wil Win Wol Zan Zel
""")

SURNAME_ENDINGS = words("""
son sen berg man mann quist strom gren lund ley ton ford well worth wood field stone by dale ham
bury ini etti ano escu enko ian idis ic ez ard eau er
""")

PLACE_STEMS = words("""
Ash Oak Elm Birch Thorn Hazel Alder Rowan Maple Cedar Willow Brook Mill Stone Marl Clay Sand Peat
Heather Moss Fern Reed Rush Otter Heron Raven Swan Hawk Fox Hart Stag Ram Lamb Wolf Bram Cold Bright
Fair Long Broad High White Black Red Green Grey Silver Copper Iron Salt Amber Kings Queens Bishop
Abbot Monk Friar Market Bridge Harbour Ferry Castle Tower Winter Summer Spring North South East
West Middle
""")
PLACE_ONSETS = words(
    "B Bl Br C Cl Cr D Dr F Fl Fr G Gl Gr H J K Kn L M N P Pl Pr R S Sk Sl St Str T Th Tr V W Z"
)
PLACE_NUCLEI = words("a e i o u ai ea")
PLACE_CODAS = words(
    "b ck d f g l ll m n nd ng nt p r rd rg rk rl rm rn rs rt rv s sk st t th v ld lm lt lv"
)
DIPHTHONG_CODAS = words("d k l m n r s t th v")
UNWANTED_STEMS = frozenset(
    words("Fuck Cunt Cock Dick Nig Fag Rap Fart Suck Spast Turd Jap Hell Tit Pis Cum Kum Ars")
)
PLACE_ENDINGS = words("""
ton ford ham wick bury mouth field stead worth ley holm by thorpe dale haven port burg heim stadt
au stad vik borg lund fors ville mont court ac ona etta ella ova ice ow grad sk mere bourne cliff
combe minster stone wood bridge march water
""")
PLACE_TYPES = words("town town town town village city port")

COUNTRIES: tuple[tuple[str, str], ...] = tuple(
    (part.partition("/")[0], part.partition("/")[2])
    for part in listed("""
    Denmark/Danish, Sweden/Swedish, Norway/Norwegian, Finland/Finnish, Iceland/Icelandic,
    Ireland/Irish, Scotland/Scottish, Wales/Welsh, England/English, France/French, Belgium/Belgian,
    Germany/German, Austria/Austrian, Switzerland/Swiss, Italy/Italian, Spain/Spanish,
    Portugal/Portuguese, Poland/Polish, Hungary/Hungarian, Romania/Romanian, Bulgaria/Bulgarian,
    Greece/Greek, Turkey/Turkish, Croatia/Croatian, Serbia/Serbian, Slovenia/Slovenian,
    Slovakia/Slovak, Estonia/Estonian, Latvia/Latvian, Lithuania/Lithuanian, Ukraine/Ukrainian,
    Russia/Russian, Georgia/Georgian, Armenia/Armenian, Egypt/Egyptian, Morocco/Moroccan,
    Tunisia/Tunisian, Algeria/Algerian, Kenya/Kenyan, Ghana/Ghanaian, Nigeria/Nigerian,
    Senegal/Senegalese, India/Indian, Nepal/Nepalese, Japan/Japanese, Korea/Korean,
    Vietnam/Vietnamese, Canada/Canadian, Mexico/Mexican, Brazil/Brazilian,
    Argentina/Argentine, Chile/Chilean, Peru/Peruvian, Bolivia/Bolivian,
    Australia/Australian, Lebanon/Lebanese, Persia/Persian,
    Malta/Maltese, Cyprus/Cypriot, Uruguay/Uruguayan
    """)
)

OCCUPATIONS = listed("""
violinist, cellist, pianist, organist, conductor, composer, singer, dancer, actor, painter,
sculptor, engraver, potter, glassblower, goldsmith, silversmith, watchmaker, clockmaker,
blacksmith, locksmith, carpenter, cabinetmaker, joiner, cooper, wheelwright, shipbuilder,
sailmaker, bookbinder, printer, publisher, bookseller, librarian, archivist, historian, novelist,
poet, journalist, translator, editor, playwright, teacher, professor, philosopher, mathematician,
astronomer, physicist, chemist, botanist, zoologist, geologist, geographer, cartographer, surveyor,
architect, bricklayer, stonemason, engineer, mechanic, miner, physician, surgeon, dentist, nurse,
midwife, pharmacist, veterinarian, lawyer, judge, notary, diplomat, civil servant, banker,
accountant, merchant, shopkeeper, baker, butcher, brewer, winemaker, confectioner, cook, farmer,
shepherd, gardener, forester, beekeeper, fishmonger, lighthouse keeper, ferry pilot, railway clerk,
postal clerk, tailor, weaver, dyer, hatter, shoemaker, saddler, furrier, lacemaker, photographer,
piano tuner, organ builder, violin maker, instrument maker, rope maker, bell founder, optician,
actuary, insurance agent, tax inspector, interpreter, ornithologist, entomologist, linguist
""")

INSTRUMENTS = listed("""
violin, viola, cello, double bass, flute, oboe, clarinet, bassoon, trumpet, trombone, tuba,
French horn, piano, organ, harpsichord, harp, guitar, lute, mandolin, accordion, concertina,
banjo, zither, dulcimer, recorder, bagpipes, saxophone, harmonica, hurdy-gurdy, xylophone, drum
""")

HOBBIES = listed("""
chess, fishing, gardening, stamp collecting, birdwatching, mountain climbing, sailing, rowing,
woodcarving, embroidery, knitting, pottery, fencing, archery, swimming, ice skating, cycling,
photography, astronomy, beekeeping, model railways, crossword puzzles, card games, billiards,
horse riding, cooking, wine tasting, calligraphy, origami, kite flying, coin collecting,
mushroom picking, choral singing, folk dancing, amateur theatre, long walks, fossil hunting,
bookbinding, watercolour painting, butterfly collecting, rose growing, toy making
""")

KNOWN_FOR = listed("""
salt mines, glassworks, paper mills, cheese market, annual kite festival, old lighthouse,
botanical garden, stone bridge, wooden church, flower market, copper mines, lace workshops,
hot springs, horse fair, apple orchards, vineyards, clock tower, marble quarries, shipyards,
pottery, puppet theatre, harbour festival, cathedral, Roman ruins, university library, carpets,
smoked fish, honey cakes, chocolate, knife makers, bell foundry, windmills, ski slopes,
sandy beaches, oyster beds, silk weavers, mustard, plum brandy, ginger biscuits, medieval walls,
astronomical clock, covered market, tulip fields, film festival, chess tournament, organ concerts,
tin toys, porcelain, rope works, cider, sausages, wool market, caves, peat bogs, lavender fields
""")

GENRES: dict[str, tuple[str, ...]] = {
    "novel": listed("""family saga, detective story, gothic romance, adventure story, ghost story,
        historical romance, sea story, political satire, coming-of-age story, spy thriller,
        pastoral comedy, war story, science fiction story, travel story"""),
    "film": listed("""western, thriller, romantic comedy, melodrama, war film, horror film,
        musical, crime drama, documentary, costume drama, road movie, slapstick comedy"""),
    "song": listed("""ballad, waltz, march, lullaby, hymn, sea shanty, love song, drinking song,
        lament, folk song, tango, serenade, work song, carol"""),
    "painting": listed("""landscape, portrait, still life, seascape, self-portrait, battle scene,
        street scene, nocturne, hunting scene, allegory, interior scene, family portrait"""),
    "play": listed("""tragedy, farce, comedy of manners, historical drama, morality play,
        tragicomedy, courtroom drama, family drama, satire, fairy tale, romantic comedy"""),
    "opera": listed("""comic opera, grand opera, chamber opera, tragic opera, fairy-tale opera,
        operetta, pastoral opera, rescue opera, historical opera"""),
}

PRODUCTS: dict[str, tuple[str, ...]] = {
    "engineering company": listed("""marine engines, steam turbines, pumps, railway signals,
        lifts, bicycles, sewing machines, agricultural machinery, printing presses, motorcycles,
        cranes, tractors, locomotives, mining drills, typewriters, sluice gates"""),
    "trading company": listed("""coffee, tea, spices, timber, furs, cotton, tobacco, grain, wool,
        dried fruit, leather, rubber, sugar, cocoa, rice, olive oil, tropical hardwoods, cork"""),
    "manufacturer": listed("""clocks, porcelain, pianos, spectacles, pencils, carpets, umbrellas,
        toys, gloves, mirrors, candles, matches, soap, perfume, telescopes, compasses, barometers,
        wallpaper, buttons, hats, cutlery, lamps, tiles, rope, sailcloth, paint, fishing nets"""),
    "food company": listed("""biscuits, chocolate, mustard, canned fish, cheese, mineral water,
        beer, brandy, jam, vinegar, pasta, marzipan, liquorice, butter, smoked ham, cider"""),
    "publishing house": listed("""school books, poetry, atlases, dictionaries, novels,
        sheet music, travel guides, cookery books, almanacs, children's books, art books,
        calendars"""),
    "film studio": listed("""silent films, newsreels, cartoons, comedies, nature films,
        musicals, detective films, costume dramas, animated films, travel films"""),
    "record label": listed("""dance music, folk songs, chamber music, jazz recordings,
        opera recordings, church music, brass band music, children's songs, film music,
        military marches"""),
    "gallery": listed("""landscapes, portraits, engravings, watercolours, sculptures, tapestries,
        ceramics, miniatures, drawings, lithographs, old maps, etchings"""),
    "theatre company": listed("""tragedies, comedies, puppet plays, pantomimes, historical dramas,
        operettas, ballets, children's plays, open-air performances, farces"""),
}
ORGANISATION_NAMES: dict[str, tuple[str, ...]] = {
    "engineering company": listed("Engineering, Machine Works, Engines, Ironworks, Foundry"),
    "trading company": listed("Trading Company, Merchants, Imports, Trading House, Shipping"),
    "manufacturer": listed("Manufacturing, Workshops, Works, Factory, Industries"),
    "food company": listed("Foods, Provisions, Delicacies, Kitchens, Larder Company"),
    "publishing house": listed("Press, Books, Publishing, Verlag, Editions"),
    "film studio": listed("Pictures, Studios, Films, Film Company, Cinema"),
    "record label": listed("Records, Sound, Recordings, Music, Gramophone Company"),
    "gallery": listed("Gallery, Art House, Salon, Collection, Fine Arts"),
    "theatre company": listed("Theatre, Players, Stage Company, Playhouse, Ensemble"),
}

TITLE_ADJECTIVES = words("""
Silent Distant Broken Golden Hollow Forgotten Crimson Pale Last First Burning Frozen Hidden Endless
Quiet Restless Scarlet Bitter Gentle Wandering Sleeping Empty Ancient Painted Borrowed Careless
Clever Crooked Dancing Drowned Early Faithful Fallen Final Floating Foolish Fragile Glass Green
Grey Haunted Heavy Honest Hungry Idle Impatient Iron Jealous Late Laughing Lonely Long Lost Lucky
Merry Midnight Narrow Nameless Noble Northern Obedient Open Patient Perfect Proud Purple Reluctant
Rusty Sacred Secret Seventh Shining Short Silver Slow Solemn Southern Stolen Strange Stubborn
Sunken Tender Thirsty Timid Uncertain Unseen Velvet Violet Weary White Wicked Wild Winter Wooden
Yellow Young
""")
TITLE_NOUNS = words("""
Harbour Garden River Window Lantern Bridge Mirror Orchard Tower Letter Winter Summer Voyage Island
Mountain Forest Road Castle Clock Candle Crown Feather Stone Shadow Storm Song Dream Promise Secret
Stranger Soldier Sailor Widow Daughter Brother Merchant Doctor Shepherd Thief Gardener Baker Dancer
Painter Fiddler Miller Hunter Pilgrim Prince Queen Beggar Wolf Fox Raven Swan Horse Lion Heron
Sparrow Butterfly Rose Lily Willow Oak Thorn Apple Wheat Honey Salt Silver Copper Glass Paper Ink
Violin Drum Bell Anchor Compass Sail Tide Wave Shore Cliff Valley Meadow Field Well Gate Door Key
Stair Room House Attic Cellar Market Station Train Carriage Wheel Ladder Kite Lamp Flame Ember Ash
Snow Frost Rain Cloud Moon Star Sun Dawn Dusk Night Morning Hour Year Wedding Funeral Feast Journey
Return Farewell Debt Bargain Quarrel Silence Whisper Echo Riddle Game Mask Curtain Portrait Map
Ledger Telegram Photograph Umbrella Overcoat Glove Ribbon Needle Thread Basket Barrel
""")

SCHOOL_ENDINGS = listed("""
College, Academy, Grammar School, Institute, Technical School, School of Arts, Conservatory,
Seminary, Polytechnic, Trade School
""")
AWARD_ENDINGS = listed("""
Prize, Medal, Award, Cross, Cup, Order of Merit, Ribbon, Trophy, Star, Laurel
""")
RIVER_ENDINGS = words("e a er en el ine ow ava isk o ir ane ell und ash")
REGION_PREFIXES = words("Upper Lower North South East West Inner Outer Old Great")
REGION_ENDINGS = words("mark land shire ia moor wald vale marsh")
MONTHS = words(
    "January February March April May June July August September October November December"
)
